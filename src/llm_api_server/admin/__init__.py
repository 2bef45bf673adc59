"""What the command line and the admin API share: keys and usage as people list and change them."""
