"""Whole sampling runs, timed; and the rules of their races."""

# dB to the images of the fp32 pipeline: below it nothing is timed
BOUND = 35.0
# by how much less the images of two conditions must agree
MARGIN = 3.0
GUIDANCE = 1.5
