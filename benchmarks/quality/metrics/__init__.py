"""Figures for sets of pictures, as the field measures them: numpy in float64, from given features."""
