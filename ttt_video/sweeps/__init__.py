"""Many runs from one file: cells, checks and the processes that run them."""
