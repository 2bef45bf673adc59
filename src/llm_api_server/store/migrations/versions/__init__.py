"""Steps of the schema, each a module. A released step is never changed."""
