"""From noise to images: settings, the loop, guidance, the diffusers scheduler."""
