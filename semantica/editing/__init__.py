"""Editing a picture by a denoiser's scores, with no training and no inversion: SDS, DDS and CDS."""
