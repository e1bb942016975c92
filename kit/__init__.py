"""The kit: what serves users of the book (brainsyn.py), one topic a module. Modules import the book
and modules above them in the README's table, never back."""
