"""diffusers' own UNets, ControlNets and autoencoders on the fused operators."""
