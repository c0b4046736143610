"""How fast this machine runs packed layers, beside what else it could run: `halfbyte bench`."""
