"""Model cards of exported policies, and their way to the hub."""
