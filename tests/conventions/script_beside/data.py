with open("a_book_that_is_not_here.txt") as file:
    text = file.read()
