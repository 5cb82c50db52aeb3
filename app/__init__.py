"""Recognise a photograph with the model that `export` wrote: on the command line, and in a page."""
