"""From hardware to placement: trees of named weights, meshes, and where each axis lives."""
