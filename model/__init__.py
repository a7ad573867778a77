"""The ground floor: a diffusion model cut in two."""
