"""Colour science and the targets of colorization: CIE Lab, quantised colours, losses."""
