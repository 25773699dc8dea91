"""How a model would run on a machine that need not be there: a cost model and a search over splits."""
