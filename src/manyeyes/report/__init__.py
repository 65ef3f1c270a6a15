"""What an evaluation found, as people read it: a page that needs nothing else, a model card, a comparison."""
