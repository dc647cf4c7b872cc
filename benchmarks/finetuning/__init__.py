"""Fine-tuning of public UNets, whole or by LoRA: steps of stock diffusers and of `semantica.accelerate`, raced."""
