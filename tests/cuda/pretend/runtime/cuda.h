// The driver API, of which torch's headers include this file and use nothing.
#pragma once
