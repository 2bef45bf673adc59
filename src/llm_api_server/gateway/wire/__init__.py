"""OpenAI's, Anthropic's and the engines' formats. Pure."""
