"""Amazon's services: what is rented there, where it may be, and how stages run on it."""
