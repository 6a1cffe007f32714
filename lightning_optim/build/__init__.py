"""From a model to an optimizer: roles, the factory, recipes, and a plan of who owns what."""
