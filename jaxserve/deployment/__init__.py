"""How a model would run on hardware that is not there: a cost model, a search over splits."""
