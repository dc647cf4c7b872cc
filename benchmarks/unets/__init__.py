"""Public UNets and their decoders: one guided evaluation, one decoding, beside what others would run."""
