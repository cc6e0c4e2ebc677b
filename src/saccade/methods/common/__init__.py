"""What several methods share: matching, clustering, sampling, arguments, budgets."""
