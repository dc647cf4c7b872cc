"""The networks: denoiser, encoders, and their arrangement for sampling."""
