-- What wrk sends: requests that lie ready in a file, at random or each in turn.
-- The file has for each a line, with its length in decimal, a space and what kind it is (which is
-- not for wrk), and then its bytes.

local requests, last, in_turn = {}, 0, false

function init(arguments)
  local file = assert(io.open(arguments[1], "rb"))
  while true do
    local length = file:read("*number")
    if not length then break end
    file:read("*line")
    requests[#requests + 1] = file:read(length)
  end
  file:close()
  in_turn = arguments[2] ~= "random"
end

function request()
  if in_turn then
    last = last % #requests + 1
    return requests[last]
  end
  return requests[math.random(#requests)]
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '\n{"requests": %d, "errors": %d, "microseconds": %d, "p50": %d, "p99": %d}\n',
    summary.requests,
    errors.connect + errors.read + errors.write + errors.timeout + errors.status,
    summary.duration, latency:percentile(50), latency:percentile(99)
  ))
end
