"""Many requests to a language model behind an OpenAI-compatible API, none of them paid twice."""
