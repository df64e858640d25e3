"""Paired comparisons of runs by resampling, and corrections for many comparisons."""
