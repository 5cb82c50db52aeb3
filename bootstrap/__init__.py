"""How a stage is run, here or elsewhere; `aws` is what only Amazon's services need."""
