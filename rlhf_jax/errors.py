"""The one exception that is meant for the user's eyes."""


class UserError(Exception):
    """Something the user can mend: one sentence that names the thing, what is allowed and what to do.

    The programs in `experiments/` print the sentence alone and exit with status 2. Any other exception
    is a fault of this project and keeps its traceback.
    """
