"""What an adaptive forward is: tokens, reductions, gates, plans and the record of what ran. Read this first."""
