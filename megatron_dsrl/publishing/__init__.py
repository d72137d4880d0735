"""Model cards of exported policies, and uploads to the hub."""
