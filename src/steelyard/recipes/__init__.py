"""One readable file per system: its data, its baseline, its claim.

``steelyard list`` names them, ``steelyard run NAME`` runs one, ``steelyard copy NAME FILE`` hands
one over to change. :mod:`steelyard.recipes.catalog` lists all systems, built or not. Importing
this package loads none of them.
"""
