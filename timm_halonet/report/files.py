"""Files that are written whole, under their earlier path too."""

from ..files import cut_name as cut_name
from ..files import json_text as json_text
from ..files import make_folder as make_folder
from ..files import remove_leftovers as remove_leftovers
from ..files import whole_file as whole_file
