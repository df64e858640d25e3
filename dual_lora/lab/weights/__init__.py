"""What training did to the weights: updates, their ranks and entries, and figures of them."""
