"""Training of segmenters: pictures with a class for each pixel in, a folder that `semantica segment` reads out."""
