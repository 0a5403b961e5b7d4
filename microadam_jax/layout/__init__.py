"""What the axes of a parameter are: names, axes, stacked layers, partition, subsets, matrices."""
