"""Tells what the axes of a parameter are: by names, shapes and the tree it stands in."""
