"""Keys and values: pages on the device, and who owns them."""
