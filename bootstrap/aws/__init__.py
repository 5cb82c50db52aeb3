"""Rent computers of Amazon, keep all data in the EU, and run stages there."""
