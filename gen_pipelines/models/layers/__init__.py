"""Parts of networks, each with a slow reference in the tests."""
