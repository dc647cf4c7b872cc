"""`cross_attention`: the operator, its plain-torch reference and its fast implementations."""
