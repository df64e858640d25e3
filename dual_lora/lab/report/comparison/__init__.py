"""Which runs a report compares, by what tests, and what it says of them."""
