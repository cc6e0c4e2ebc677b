"""What is learned beyond classes: each task is data, a head or two, a loss and a measure."""
