"""Run stages, on this machine or elsewhere; `aws` holds what only Amazon's services need."""
