"""Text in and out: tokens, chat templates, grammars, and the parsers of what models write."""
