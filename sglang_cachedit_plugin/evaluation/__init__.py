"""What the tuner and the comparison share: quality measures and plots."""
