"""Runs on a tree what a method does to one parameter: which leaves, in which chunks, by what."""
