"""`group_norm`: the operator, its plain-torch reference and its fast implementations."""
