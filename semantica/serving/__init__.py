"""`semantica serve`: images from an address, with the endpoints that clients of OpenAI's API speak."""
