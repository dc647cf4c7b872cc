// No number of this type is computed with.
