"""The commands of `hfprune`, one file each."""
