"""What recognises a photograph with the model that the pipeline has made: a command, and a page for a phone."""
